"""What clients and administrators reach: routes, keys, the page."""
