"""Starts the processes of a run on the machines of a Ray cluster. Ray is imported only where it is used."""
