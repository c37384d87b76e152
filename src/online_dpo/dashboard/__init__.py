"""The dashboard: a local web server that reads run folders. It never imports torch, transformers or the trainer."""
