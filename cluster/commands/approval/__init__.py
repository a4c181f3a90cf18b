"""What the people get who have to agree: a dossier about a model, and a bundle for a site."""
