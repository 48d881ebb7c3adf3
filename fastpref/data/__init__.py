"""From preference records to batches: records → prepare → store → sampling."""
