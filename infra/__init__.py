"""Whatever starts something: local servers, models, the command line."""
