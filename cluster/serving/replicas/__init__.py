"""The same service in several processes of a Ray cluster, behind one door."""
