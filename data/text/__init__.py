"""Long texts: tokenized once, packed, cut into chunks."""
