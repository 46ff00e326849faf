"""Many simulated users, each with a life of the loop of its own."""
