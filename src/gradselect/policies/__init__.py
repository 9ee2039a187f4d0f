"""The policies, one final class per file."""
