"""The Triton forms of the ops: kernels and their launchers, imported where a GPU or the interpreter runs them."""
