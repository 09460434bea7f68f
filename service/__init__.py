"""ASK AND FETCH: the HTTP API and the web page. `service.app.create_app` wires it, `service.run.serve` starts it."""
