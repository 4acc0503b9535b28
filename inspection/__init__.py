"""Look inside a trained network: its attentions, what it sees in images, its mistakes, and the report of a run."""
