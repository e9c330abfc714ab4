"""What a sweep would cost, before it starts."""
