"""The ground of every stage: run folders, training, memory, processes, files."""
