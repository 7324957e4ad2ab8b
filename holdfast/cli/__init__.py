"""The command line: joins the engine and the adapters."""
