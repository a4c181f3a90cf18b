"""What a silo is asked to train on and when: the request of a round, and rounds whose updates come at any time."""
