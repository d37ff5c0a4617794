"""memtrain trains language models that remember."""
