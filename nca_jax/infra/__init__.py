"""What a run stands on: mesh, processes, checkpoints, records, optimizer; nothing of the method."""
