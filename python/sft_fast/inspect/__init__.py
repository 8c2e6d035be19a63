"""Looking at data sets: what the model will read, and what it will learn. Imports neither torch nor Ray."""
