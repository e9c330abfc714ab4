"""Choosing the next trial and stopping bad ones early."""
