"""Three ways to get a job's captions: a server, batch files, a Ray cluster. Each runs the same two pure functions."""
