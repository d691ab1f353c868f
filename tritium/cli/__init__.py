"""The command line. Importing it imports neither torch nor the engine; commands do, when they run."""
