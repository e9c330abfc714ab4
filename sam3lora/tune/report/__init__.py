"""Tables, charts and the report of a sweep."""
