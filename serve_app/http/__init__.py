"""The HTTP ingress: routes, request checks, response bodies, errors, and calls to the model replicas."""
