"""The backends that come with kleinctl, each written as a stranger would write one."""
