"""Dense prediction on the vision trunk: the head, and bottleneck adapters before the trunk's layers."""
