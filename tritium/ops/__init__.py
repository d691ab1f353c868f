"""The mathematics: one op a file, each with its spec and a reference in plain PyTorch. Triton lives here alone."""
