"""The lean HTTP client of workers and providers."""
