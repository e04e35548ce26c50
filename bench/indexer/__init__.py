"""A small sparse-attention model of key-value recall: what the indexer keeps, and what two real bugs lose."""
