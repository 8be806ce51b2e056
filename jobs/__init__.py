"""Entry points that wire the pipeline together; nothing here is imported by the pipeline."""
