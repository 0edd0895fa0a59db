"""The pages in a real browser: what people see, and that nothing else happens."""
