"""Why a model answers what it answers: which of the tokens that it has read speak for the answer."""
