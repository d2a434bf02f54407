"""Reading what people have: files of records, the shapes of other tools, and conversations."""
