"""The side that leads: rounds, exchange with silos, commits, the trusted aggregator, which never imports silo/."""
