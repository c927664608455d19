"""Questions about a Graph: regions, workloads, coupling, statistics."""
