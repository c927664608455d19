"""What came out: the figures of report.json, their printed form, and a page for people."""
