"""The coordinator's side: rounds, requests to silos, commits, the trusted aggregator. It never imports silo/."""
