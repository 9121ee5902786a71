"""The server for programs: `convoynet.serve` and `convoynet.load`."""
