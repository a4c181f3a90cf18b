"""Many silos on one machine, and what only public data allow."""
