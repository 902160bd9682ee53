"""The `framestream` command: sharding, verifying, training, and the demonstration that runs them all."""
