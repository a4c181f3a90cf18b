"""What a dataset has spent: charge before release, chain, anchor, reconciliation."""
