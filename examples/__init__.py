"""The demo: its data, its configuration, and the commands it runs."""
