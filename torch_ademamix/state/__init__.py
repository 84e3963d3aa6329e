"""Options of groups, optimizer state in flat buffers (arenas), the plan of a step's op calls, and loading."""
