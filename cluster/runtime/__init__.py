"""Jobs, gangs of ranks and their placement on Ray."""
