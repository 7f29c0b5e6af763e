"""Node providers for Ray's cluster launcher: where its nodes come from, and how commands get there."""
