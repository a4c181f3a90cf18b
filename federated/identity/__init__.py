"""Who is who: private keys, public cards, trust, X.509."""
