"""A drill: real runs that are disturbed, each beside the same run without the fault."""
