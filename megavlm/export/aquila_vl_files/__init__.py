"""Files that every exported Aquila-VL folder carries; nothing here is imported."""
