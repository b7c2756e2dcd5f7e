"""Read along in the server's log. Light: the process that does it imports the standard library only."""
