"""One file per resource. A new resource is a new file here and one line in `service.app.API_ROUTERS`."""
