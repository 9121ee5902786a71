"""What lives on its own and must not die, hang or be left behind unseen: tasks, threads and processes."""
