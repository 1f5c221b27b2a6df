"""One file that lets support see what you see: collected, redacted, written; and read again elsewhere."""
