"""The dossier: one folder for who has to approve that a model leaves."""
