"""The example configurations, as files: `framestream train demo` finds `demo.yaml` here by its name."""
